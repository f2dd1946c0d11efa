"""baichuan-sft: distributed supervised fine-tuning for the Baichuan family of language models.

Importing this package costs nothing and still registers the family: the classes join transformers'
Auto classes as soon as transformers is imported, before or after.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BaichuanConfig": "baichuan_sft.model.configuration_baichuan",
    "BaichuanForCausalLM": "baichuan_sft.model.modeling_baichuan",
    "BaichuanModel": "baichuan_sft.model.modeling_baichuan",
    "BaichuanTokenizer": "baichuan_sft.model.tokenization_baichuan",
    "Message": "baichuan_sft.data.formats",
    "render": "baichuan_sft.data.template",
    "load_model": "baichuan_sft.checkpoint",
    "load_tokenizer": "baichuan_sft.checkpoint",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from baichuan_sft.model.configuration_baichuan import BaichuanConfig
    from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM, BaichuanModel
    from baichuan_sft.model.tokenization_baichuan import BaiChuanTokenizer, BaichuanTokenizer

    AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
    AutoModel.register(BaichuanConfig, BaichuanModel, exist_ok=True)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
    # The second class makes Baichuan-7B's spelling of the name known, which transformers looks up by name.
    AutoTokenizer.register(
        BaichuanConfig,
        tokenizer_class=BaichuanTokenizer,
        slow_tokenizer_class=BaiChuanTokenizer,
        exist_ok=True,
    )
    _stand_in_for_vendor_code()
    # save_pretrained then copies the model's own files beside the weights, and the result loads anywhere.
    BaichuanConfig.register_for_auto_class()
    BaichuanModel.register_for_auto_class("AutoModel")
    BaichuanForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    BaichuanTokenizer.register_for_auto_class("AutoTokenizer")


def _stand_in_for_vendor_code() -> None:
    """Let trust_remote_code find these classes where a directory's auto_map names the vendor's.

    AutoTokenizer would run the directory's defunct code otherwise, and older versions of the others too.
    """
    from transformers.models.auto import auto_factory, configuration_auto, tokenization_auto

    load = auto_factory.get_class_from_dynamic_module

    def own_first(class_reference: str, *args: Any, **kwargs: Any) -> Any:
        file, _, name = class_reference.rpartition("--")[2].partition(".")
        own = None
        if file in ("configuration_baichuan", "modeling_baichuan", "tokenization_baichuan"):
            own = getattr(importlib.import_module(f"{__name__}.model.{file}"), name, None)
        return own or load(class_reference, *args, **kwargs)

    for module in (auto_factory, configuration_auto, tokenization_auto):
        module.get_class_from_dynamic_module = own_first  # type: ignore[attr-defined]


class _AfterTransformers(MetaPathFinder):
    """Registers the family right after ``import transformers``.

    Importing transformers' models here instead would make ``baichuan-sft --help`` take eight seconds.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "transformers":
            return None
        # Back in place afterwards: libraries look for the spec without importing.
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                sys.meta_path.remove(self)
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTransformers())
