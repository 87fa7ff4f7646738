"""One conversation that moves between device and cloud. Run: python examples/chat.py BUNDLE tcp://HOST:PORT [KEYS]"""

import sys

from isthmus.edge import Device

TURNS = (
    ("stream", "Name a planet."),
    ("split", "How far away is it?"),
    ("local", "Say that in one word."),
    ("stream", "Thank you."),  # the cloud still holds the first turn
)

if len(sys.argv) < 3:
    sys.exit(__doc__)
bundle, cloud, *keys = sys.argv[1:]
with Device(bundle, cloud, keys=keys[0] if keys else None) as device:
    for mode, question in TURNS:
        print(f"> {question}")
        for token in device.chat(question, max_tokens=40, mode=mode):
            print(token.text, end="", flush=True)
        stats = device.stats
        print(f"\n[{mode}: {stats.reused_tokens} of {stats.prompt_tokens} prompt tokens were known already]\n")
