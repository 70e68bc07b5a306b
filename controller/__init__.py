"""The caretaker: starts pdserve on Ray, keeps it alive and ends it. The only code that may know all rooms,
and the only one that knows Ray.

The life of a system here:

1. `cli` reads the command line, `pdserve.config` makes one validated value of it.
2. `launch` checks what can be checked at once: the APIs' ports (`ports` holds them), the model's files
   (`model_files`), and whether the workers fit in this machine (`room`). It starts a local Ray or connects to
   a running one (`cluster`), and starts the controller.
3. `controller_actor` is the named, detached actor that Ray restarts; its `controller.Controller` has one
   `pools.Slot` per router and worker. A slot creates its actor (`actors`), waits until it is placed, started
   and over, and begins again.
4. `worker_actor` loads the engine and runs a `worker.Worker`; `router_actor` runs a `router.router.Router`
   behind HTTP and gRPC (`router_front`). Their states are those of `status.ProcessState`.
5. Whenever the set of ready workers changes, the controller sends every router the new membership. When all
   routers have connected to all workers the system is ready; `launch` prints its URL.
6. `pdserve down`, Ctrl-C or a failed start: routers stop taking requests, then workers stop, then the local
   Ray.

`running` keeps a small file per system, by which `status`, `down` and `generate` find it from another
terminal.
"""
