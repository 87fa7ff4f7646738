"""The first layers here, the rest in a cloud. Run: python examples/split.py BUNDLE tcp://HOST:PORT [KEYS]"""

import sys

from isthmus.edge import Device

if len(sys.argv) < 3:
    sys.exit(__doc__)
bundle, cloud, *keys = sys.argv[1:]
with Device(bundle, cloud, keys=keys[0] if keys else None, mode="split") as device:
    for codec in ("f32", "f16", "int8"):
        device.reset()
        for token in device.chat("Why is the sky blue?", max_tokens=40, codec=codec):
            print(token.text, end="", flush=True)
        print(f"\n[{codec}: {device.stats.bytes_up:,} bytes up, {device.stats.tok_s:.0f} tokens/s]\n")
