"""The mark of tests that `make soak` runs, and CI does not."""
import os

import pytest

soak = pytest.mark.skipif(not os.environ.get("PROXY_SFT_SOAK"), reason="the long form: set PROXY_SFT_SOAK=1")
