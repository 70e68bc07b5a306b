"""The demo model's recall through HTTP, split against unsplit: a KV block that is wrong or in the wrong place
shows as a wrong number."""

import asyncio

import openai
import torch

from controller.worker import WorkerSettings
from pdserve.demo import demo_model_path, recall_prompt
from pdserve.engine.settings import EngineSettings
from tests.local_system import LocalSystem

LENGTHS = (64, 256, 512, 1024)
PROMPTS_PER_LENGTH = 10
LEAST_RECALL = 0.95


async def test_recall_is_the_same_split_and_unsplit() -> None:
    torch.set_num_threads(1)
    prompts = [recall_prompt(seed, length) for length in LENGTHS for seed in range(PROMPTS_PER_LENGTH)]
    questions = [prompt.prompt for prompt in prompts]
    unsplit = await answers(questions, num_prefill=0, transports=("grpc",))
    for transports in (("shared_memory",), ("grpc",)):
        assert await answers(questions, num_prefill=1, transports=transports) == unsplit
    right = sum(answer == prompt.answer for answer, prompt in zip(unsplit, prompts, strict=True))
    assert right >= LEAST_RECALL * len(prompts)


async def answers(questions: list[str], num_prefill: int, transports: tuple[str, ...]) -> list[str]:
    """The greedy answers, all asked at once, in the checkpoint's own dtype."""
    engine = EngineSettings(
        str(demo_model_path()), served_name="demo", threads=1, kv_memory_bytes=64 << 20, chunk_tokens=128
    )
    settings = WorkerSettings(transports=transports)
    async with LocalSystem(engine, num_prefill, worker_settings=settings) as system:
        async with openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="demo",
                        messages=[{"role": "user", "content": question}],
                        max_tokens=24,
                        temperature=0,
                    )
                    for question in questions
                )
            )
        await system.at_rest()
    return [reply.choices[0].message.content or "" for reply in replies]
