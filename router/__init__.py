"""Room 1, the front desk: from a client's request to the last token of the answer.

The life of a request here:

1. `http_api` or `grpc_api` validates it, `text` applies the chat template and tokenises, once.
2. `journey.Journey.generate` takes it; `admission` lets it in or refuses it at once.
3. `placement` picks a decode worker and, unless that one computes the prompt itself, a prefill worker, from
   what `fleet` believes about every worker and `prefix_index` knows about cached prefixes.
4. `links` submits it on the decode worker's Session; events come back on the submission's queue.
5. A failed attempt goes back to 3 with the output tokens that the client has already been given.
6. Tokens go back the same way; `text` turns them into text and finds stop strings.
7. What it went through is kept as a report (`request_reports`), and told in one line of the log.

The router holds no KV and loads no model: neither torch nor the engine is imported here.
"""
