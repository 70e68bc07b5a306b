"""A whole pdserve in one process: router, prefill worker and decode worker, no Ray and no socket.

    python examples/in_process.py

Both workers load the built-in model. Messages between the three go through a network in memory, as in the
tests; everything else is the code that serves on a cluster.
"""

import asyncio

from controller.worker import Worker
from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.ids import RouterId, WorkerId
from pdserve.contract.messages import Members, Role
from pdserve.contract.sampling import SamplingParams
from pdserve.demo import demo_model_path, recall_prompt
from pdserve.engine.engine import ModelEngine
from pdserve.engine.executor import ThreadExecutor
from pdserve.engine.settings import EngineSettings
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc
from router.requests import GenerateRequest
from router.router import Router
from router.text import TextModel

SETTINGS = EngineSettings(str(demo_model_path()), threads=1, kv_memory_bytes=16 << 20)


async def main() -> None:
    network = MemoryNetwork()
    workers = [await start_worker(network, role) for role in (Role.PREFILL, Role.DECODE)]
    router = Router(RouterId("router-0"), MemoryRpc(network, "router"), LoopClock(), SystemRng())
    router.set_members(Members(0, tuple(worker.member() for worker in workers)))
    try:
        await ask(router, TextModel.load(demo_model_path()))
    finally:
        await router.close()
        for worker in workers:
            await worker.stop()


async def start_worker(network: MemoryNetwork, role: Role) -> Worker:
    engine = ModelEngine.load(SETTINGS)
    rpc = MemoryRpc(network, role.value)
    worker = Worker(WorkerId(role.value), role, engine, ThreadExecutor(engine), rpc, LoopClock(), SystemRng())
    await worker.start(f"{role.value}:0")
    return worker


async def ask(router: Router, text: TextModel) -> None:
    recall = recall_prompt(seed=1, num_tokens=200)
    prompt = text.encode_chat([{"role": "user", "content": recall.prompt}])
    request = GenerateRequest(prompt, SamplingParams(max_tokens=20, temperature=0.0))
    answer = b""
    async for delta in router.generate(router.new_request_id(), request):
        answer += delta.tokens
        if delta.finish is not None and delta.timings is not None:
            print(f"KV that travelled: {delta.timings.transfer_bytes} bytes by {delta.timings.transport}")
            print(f"of that transfer the second token waited {delta.timings.transfer_exposed_s * 1e3:.1f} ms")
    print(f"asked:    {recall.question}")
    print(f"answered: {text.decode(answer)}")
    print(f"expected: {recall.answer}")


if __name__ == "__main__":
    asyncio.run(main())
