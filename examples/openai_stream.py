"""Stream a chat through OpenAI's own client.

pdserve up                       # in another terminal
pip install openai
python examples/openai_stream.py [URL]
"""

import sys

from openai import OpenAI

QUESTION = "Ada has the number 4711. Every rabbit likes honey. Otto 2309. What is the number of Ada?"


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="not needed")
    model = client.models.list().data[0].id
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n{chunk.usage.prompt_tokens} prompt and {chunk.usage.completion_tokens} output tokens")


if __name__ == "__main__":
    main()
