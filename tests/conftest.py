"""Shared by all tests: offline, one thread per process, the golden fixtures."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A slow machine is no failure. The same examples each time: one that fails is there again at the next run;
# a soak looks for others.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize="BAICHUAN_SFT_SOAK" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")


@pytest.fixture(scope="session", params=["baichuan1_like", "baichuan2_like", "baichuan1", "baichuan2"])
def vocabulary(request):
    """Name of each vocabulary, of which the vendor's own lie outside the repository."""
    from fixtures import VOCABULARIES

    if not VOCABULARIES[request.param].exists():
        pytest.skip(f"needs the vendor's vocabulary {VOCABULARIES[request.param]}")
    return request.param


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    from fixtures import VOCABULARIES

    from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

    return BaichuanTokenizer(VOCABULARIES[vocabulary])


@pytest.fixture(scope="session")
def small():
    """The tokenizer that the repository ships."""
    from fixtures import SMALL_VOCABULARY

    from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

    return BaichuanTokenizer(SMALL_VOCABULARY)


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
