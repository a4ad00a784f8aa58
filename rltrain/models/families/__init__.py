"""The architectures that can be trained, by the name in `config.json`; a file for each maker of models."""

from __future__ import annotations

from rltrain.models.families.deepseek import DEEPSEEK
from rltrain.models.families.family import Family
from rltrain.models.families.gemma import GEMMA
from rltrain.models.families.glm import GLM
from rltrain.models.families.granite import GRANITE
from rltrain.models.families.llama import LLAMA
from rltrain.models.families.minimax import MINIMAX
from rltrain.models.families.mistral import MISTRAL
from rltrain.models.families.olmo import OLMO
from rltrain.models.families.openai import OPENAI
from rltrain.models.families.phi import PHI
from rltrain.models.families.qwen import QWEN
from rltrain.models.families.smollm import SMOLLM
from rltrain.models.families.xiaomi import XIAOMI

FAMILIES: dict[str, Family] = {
    **LLAMA,
    **MISTRAL,
    **GRANITE,
    **SMOLLM,
    **QWEN,
    **GLM,
    **OLMO,
    **DEEPSEEK,
    **MINIMAX,
    **PHI,
    **GEMMA,
    **XIAOMI,
    **OPENAI,
}
SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
