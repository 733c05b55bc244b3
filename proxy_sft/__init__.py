__version__ = "0.1.0"

import logging

# bitsandbytes says at its import, on processors with AVX512-BF16, that an optional 4-bit kernel is missing; nothing here uses it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
