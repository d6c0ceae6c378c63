"""List the private and undocumented names of other packages that we use, and say in one line which is missing.

An upper limit in pyproject.toml holds each of these packages to versions that have them. The nightly run tries newer
ones: tests/compat/test_foreign.py then names what is gone, and what it was for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Foreign:
    """A name that another package does not promise.

    Attributes:
        owner: the module, or the class whose instances have it, as `module:Class`.
        name: the name.
        why: what we use it for.
    """

    owner: str
    name: str
    why: str

    @property
    def qualified(self) -> str:
        """The name as a function tells it: module, class and name."""
        return f"{self.owner.replace(':', '.')}.{self.name}"

    def of(self, instance: Any = None) -> Any:
        """Return what has this name in an instance; None: in the owner.

        Raises:
            AttributeError: the package's version has no such name.
            ImportError: the package is not installed.
        """
        try:
            return resolve_name(f"{self.owner}.{self.name}") if instance is None else getattr(instance, self.name)
        except (AttributeError, ImportError) as error:
            package = self.owner.partition(".")[0].replace("_", "-")
            text = f"{package} {version(package)} has no {self.name} in {self.owner}, by which {self.why}"
            raise AttributeError(text) from error


GET_CLASSES = Foreign("mlx_lm.utils", "_get_classes", "the classes of an architecture are found")
TOKENIZER = Foreign("mlx_lm.tokenizer_utils:TokenizerWrapper", "_tokenizer", "the tokenizer of transformers is reached")
INFER_TOOL_PARSER = Foreign(
    "mlx_lm.tokenizer_utils", "_infer_tool_parser", "the parser of a chat template's calls is chosen as mlx-lm does"
)
LENGTH = Foreign("mlx_lm.models.cache:BatchKVCache", "_idx", "rows at the same positions are found")
KEPT_SHARE = Foreign("mlx.nn:Dropout", "_p_1", "frozen blocks that drop features are found")
MERGE_PICTURE = Foreign(
    "mlx_vlm.models.llava.llava:Model",
    "_merge_input_ids_with_image_features",
    "a tower is used without its language model",
)
LOAD_YAML = Foreign("lm_eval.tasks._yaml_loader", "load_yaml", "the task in a YAML file is read")
BARS = Foreign("lm_eval.api.task", "tqdm", "bars that are not ours are hidden")
MESSAGES = Foreign("tinker.proto", "tinker_public_pb2", "requests of tinker's client are read")
BYTE_LETTERS = Foreign(
    "transformers.convert_slow_tokenizer", "bytes_to_unicode", "bytes are told from letters in a vocabulary"
)
CLASSIFIERS = Foreign(
    "transformers.models.auto.modeling_auto",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "the class that loads a score head is named",
)
INTERCEPTION = Foreign(
    "verifiers.v1", "_interception", "an environment's calls of a model are answered here"
)  # of one that is served

# The recurrences that kernels/recurrent.py replaces while a model is trained. An architecture's module need not be loaded.
GATED_DELTA = Foreign("mlx_lm.models.gated_delta", "gated_delta_update", "the gated delta rule has other kernels")
STATE_SPACE = Foreign(
    "mlx_lm.models.ssm", "ssm_update", "Mamba-2, Falcon-H1, Nemotron-H and PLaMo 2 have other kernels"
)
MAMBA = Foreign("mlx_lm.models.mamba:MambaBlock", "_process_sequence", "Mamba's tokens are projected together")
JAMBA = Foreign("mlx_lm.models.jamba:JambaMambaMixer", "ssm_step", "Jamba's scan keeps no states")
LIGHTNING = Foreign("mlx_lm.models.bailing_moe_linear", "recurrent_gla", "lightning attention keeps no states")
LIGHTNING_HYBRID = Foreign("mlx_lm.models.bailing_hybrid", "recurrent_gla", "lightning attention keeps no states")
GATED_SCAN = Foreign("mlx_lm.models.recurrent_gemma", "rnn_scan", "RecurrentGemma's scan keeps no states")
GATED_LAYER = Foreign("mlx_lm.models.recurrent_gemma:RGLRU", "__call__", "RecurrentGemma's gates are float32")
WKV = Foreign("mlx_lm.models.rwkv7:Rwkv7TimeMixing", "_wkv7", "RWKV-7's recurrence keeps no states")
RECURRENCES = (
    GATED_DELTA, STATE_SPACE, MAMBA, JAMBA, LIGHTNING, LIGHTNING_HYBRID, GATED_SCAN, GATED_LAYER, WKV,
)  # fmt: skip
