"""Room 3: turns prompts into streams of tokens.

The life of a request here (its phases are in `decode_worker.request.Phase`):

1. A router's `Submit` arrives on its Session stream (`streams.SessionServer`). What the prefix cache holds of
   the prompt is pinned: WAITING.
2. Split: a `PrefillFetch` calls the prefill worker that the router chose. When the request is next in line
   there, the whole prompt is reserved here: RECEIVING. The first token is passed on as soon as it arrives.
   Local: the loop reserves the prompt itself and computes it in chunks beside the running batch: PREFILLING.
3. All KV is verified or computed: DECODING. The sequence is part of every step; output tokens that an
   earlier attempt has already delivered are computed again first, in decode-shaped rows.
4. After each step every router gets one `Frame` with its sequences' new tokens.
5. The end, whatever it is, releases the hold: ENDED. Full blocks stay as prefix cache.

`DecodeLoop` also computes prompts for other workers: every worker is a source.
"""
