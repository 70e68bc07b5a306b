"""The examples run as their docstrings say, and print what transformers itself would answer."""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.openai_stream import QUESTION
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from pdserve.demo import demo_model_path
from pdserve.engine.settings import EngineSettings
from router.grpc_api import serve_grpc
from router.text import TextModel
from tests.local_system import LocalSystem

ROOT = Path(__file__).resolve().parents[2]
DEMO = EngineSettings(
    str(demo_model_path()), dtype="float32", device="cpu", threads=1, kv_memory_bytes=16 << 20
)
TEXT = TextModel.load(demo_model_path())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected_answer() -> str:
    """The greedy answer to the examples' question, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    prompt = unpack_tokens(TEXT.encode_chat([{"role": "user", "content": QUESTION}]))
    with torch.inference_mode():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    answer = TEXT.decode(pack_tokens(output[0, len(prompt) :].tolist()))
    assert "4711" in answer, "the examples show a question that the demo model can answer"
    return answer


async def run_example(name: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "examples" / name),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def test_openai_stream(expected_answer: str) -> None:
    async with LocalSystem(DEMO) as system:
        printed = await run_example("openai_stream.py", system.url)
        await system.at_rest()
    answer, usage = printed.splitlines()
    assert answer == expected_answer
    assert "prompt and" in usage


async def test_grpc_stream(expected_answer: str) -> None:
    async with LocalSystem(DEMO) as system:
        grpc_api = await serve_grpc(system.router, TEXT, "127.0.0.1", 0)
        printed = await run_example("grpc_stream.py", f"127.0.0.1:{grpc_api.port}")
        await grpc_api.stop()
        await system.at_rest()
    assert printed.splitlines()[0] == expected_answer


async def test_in_process() -> None:
    printed = await run_example("in_process.py")
    assert "KV that travelled" in printed
    assert "answered:" in printed
