"""The module tree of a configuration, without weights."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from pliant.errors import UnsupportedModelError


def empty_model(config: Any, trust_remote_code: bool = False) -> Any:
    """The transformers causal language model of `config`, every parameter on the meta device."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    name = f"{getattr(config, 'model_type', '?')} ({', '.join(config.architectures or ['?'])})"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; Pliant compresses decoder-only language models"
        )
    config = copy.deepcopy(config)
    # The plain loop over experts multiplies by one slice at a time, which a code can stand in for.
    config._experts_implementation = "eager"
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise UnsupportedModelError(
            f"transformers has no causal language model for {name}: {reason}"
        ) from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


def find_blocks(model: Any) -> list[str]:
    """Paths of the decoder layers: the one list of num_hidden_layers modules of one class."""
    config = model.config.get_text_config(decoder=True)
    count: int = getattr(config, "num_hidden_layers", 0)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and len({type(layer) for layer in module}) == 1
        and any(True for _ in module[0].parameters())
    ]
    # A list nested in a layer (experts, branches) may be as long as the list of layers itself.
    found = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if len(found) != 1:
        what = f"{len(found)} lists ({', '.join(found)})" if found else "no list"
        raise UnsupportedModelError(
            f"cannot tell the decoder layers of {type(model).__name__}: {what} of "
            f"num_hidden_layers={count} modules of one class"
        )
    return [f"{found[0]}.{index}" for index in range(count)]
