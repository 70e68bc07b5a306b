"""The router's admin server: what this router sees, for people who operate it.

It has a port of its own, which is 127.0.0.1's unless configured otherwise, and everything but the page's own
files needs the admin token. Nothing here changes what the router does.

    GET /admin/           the live page (`page/`)
    GET /admin/state      one snapshot as JSON (`state.Snapshot`)
    GET /admin/events     the same about once a second, as server-sent events
    GET /admin/requests   reports of the requests that run and of the last ones that ended
    GET /admin/requests/{id}  the report of one
        /admin/api/...    the router's own HTTP API, where the page tries a prompt
"""
