"""A model on this device alone. Run: python examples/local.py BUNDLE"""

import sys

from isthmus.edge import Device

if len(sys.argv) < 2:
    sys.exit(__doc__)
with Device(sys.argv[1]) as device:
    for token in device.chat("Why is the sky blue?", max_tokens=60):
        print(token.text, end="", flush=True)
    print(f"\n{device.stats.tok_s:.0f} tokens/s, the first after {device.stats.ttft_ms:.0f} ms")
