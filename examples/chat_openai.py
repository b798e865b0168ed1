"""Talk to a running `thalweg serve` with the `openai` client: one question, streamed, then what it cost.

python examples/chat_openai.py [http://127.0.0.1:8000/v1]
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "What is the longest river of Europe?"}],
    max_tokens=32,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
usage = None
for chunk in stream:
    usage = chunk.usage or usage
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
assert usage is not None
details = usage.prompt_tokens_details
cached = details.cached_tokens if details else 0
print(f"\n{usage.prompt_tokens} prompt tokens ({cached} cached), {usage.completion_tokens} output tokens")
