"""The load generator: requests to any OpenAI-compatible URL, and what came of them. Knows no room of pdserve.

One run, step by step:

1. `traces` reads recorded arrivals, or `arrivals` draws them: when each request is due, how long its prompt
   and its answer are, which prefix it shares with others.
2. `prompts` turns lengths and prefix ids into prompts: equal ids become equal tokens.
3. `driver` sends every request when it is due, whatever became of those before it (open loop), or keeps a
   number of them in flight (closed loop). `target` speaks HTTP and notes when each piece of the answer came.
4. `summary` turns the records into percentiles, throughput and goodput. Times count from when a request
   was *due*, so a server that makes the generator late does not look better for it.
5. `sweep` repeats runs at growing rates to find the knee; `report` and `page` show the results.
"""
