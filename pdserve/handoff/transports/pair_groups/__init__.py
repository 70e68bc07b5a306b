"""What two workers share for the `process_group` transport: a link, and while it is useful a group.

The life of a link, from a decode worker to a source:

1. The first transfer between the two opens it: a Kv stream that stays open. What the ends say there is in
   `messages`. When it breaks, its transfers are broken: that is how a dead or frozen peer is noticed.
2. The decode worker proposes a group (`two_rank_group`), both build it in the background, and what torch's
   rendezvous has to exchange travels on the link. `budget` says how many groups a worker may have.
3. Segments move one by one: the source has them ready and says so with the Segment message, the decode
   worker asks for each with a Want, and only then both post their operations, in the order of the Wants.
   As long as there is no group the bytes come on the link itself.
4. A group that fails is dropped at both ends, what had not arrived through it comes on the link, and the next
   segment that is wanted begins to build another. Calls do not notice.

`source_link` and `receiver_link` are the two ends, `live_group` is what both know of a group, `staging` is
how pieces come out of one pool and into the other.
"""
