__version__ = "0.1.0"

import sys

# before what takes half a second to import
if sys.argv[:1] and sys.argv[0].endswith("proxy-sft") and sys.argv[1:2] == ["run"]:
    from .core.stop_requests import answer_early_signals
    answer_early_signals()

import logging

# bitsandbytes says at its import, on processors with AVX512-BF16, that an optional 4-bit kernel is missing; nothing
# here uses it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# torchao names libraries for other GPUs that did not load; its 8-bit training uses PyTorch's own products
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
