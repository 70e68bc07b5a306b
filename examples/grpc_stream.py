"""Stream a chat over gRPC. `pdserve status --json` shows the address as `grpc_address`.

pdserve up --grpc-port 8001      # in another terminal
python examples/grpc_stream.py [HOST:PORT]
"""

import sys

import grpc

from pdserve.api.v1 import generate_pb2 as pb
from pdserve.api.v1 import generate_pb2_grpc as pb_grpc

QUESTION = "Ada has the number 4711. Every rabbit likes honey. Otto 2309. What is the number of Ada?"


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.Message(role="user", content=QUESTION)]),
        max_tokens=20,
        sampling=pb.Sampling(temperature=0),
    )
    with grpc.insecure_channel(address) as channel:
        for chunk in pb_grpc.GenerationStub(channel).GenerateStream(request, timeout=60):
            print(chunk.choice.text, end="", flush=True)
    usage = chunk.usage  # the last chunk has it
    print(f"\n{usage.prompt_tokens} prompt and {usage.completion_tokens} output tokens")


if __name__ == "__main__":
    main()
