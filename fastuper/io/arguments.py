"""Arguments that Transformers' `from_pretrained` methods take, and ours accept at the values that do nothing.

One table for configurations, image processors and models: scripts pass the same arguments to all three.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

from fastuper.io.hub import HubOptions

# Accepted with any value: the value only labels the request, or asks for what happens anyway.
IGNORED = (
    "_commit_hash",
    "_fast_init",
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "low_cpu_mem_usage",
    "mirror",
    "resume_download",
    "user_agent",
)

ONE_DEVICE = "the whole model goes to one device: pass device="
NO_CODE = "code of a repository is never run; leave it out"
NO_KERNELS = "the operations choose their kernels; leave it out"
QUANTISED = "quantised weights are not supported; dtype=torch.bfloat16 halves the memory"
SAFETENSORS = "convert the checkpoint to safetensors first"

# Refused, unless the value is empty or False: each with the remedy.
REFUSED = {
    "allow_all_kernels": NO_KERNELS,
    "code_revision": NO_CODE,
    "device_mesh": ONE_DEVICE,
    "distributed_config": ONE_DEVICE,
    "experts_implementation": "there are no experts; leave it out",
    "from_flax": SAFETENSORS,
    "from_tf": SAFETENSORS,
    "fusion_config": NO_KERNELS,
    "generation_config": "there is no text to generate; leave it out",
    "gguf_file": SAFETENSORS,
    "kernel_config": NO_KERNELS,
    "key_mapping": "rename the state dict and pass it to load_state_dict",
    "load_in_4bit": QUANTISED,
    "load_in_8bit": QUANTISED,
    "max_memory": ONE_DEVICE,
    "offload_buffers": ONE_DEVICE,
    "offload_folder": ONE_DEVICE,
    "offload_state_dict": ONE_DEVICE,
    "proxies": "set the environment variable HTTPS_PROXY",
    "quantization_config": QUANTISED,
    "torchscript": "pass return_dict=False to forward",
    "tp_plan": ONE_DEVICE,
    "tp_size": ONE_DEVICE,
    "trust_remote_code": NO_CODE,
    "use_fast": "images are resized with Pillow, as with use_fast=False; leave it out",
    "use_kernels": NO_KERNELS,
}

# Refused, except these values (and None).
ONLY = {
    "adapter_name": (("default",), "load adapters with peft"),
    "attn_implementation": (("eager", "sdpa"), "leave it out"),
    "backend": (("pil",), "images are resized with Pillow; leave it out"),
    "weights_only": ((True,), "code in a pickle is never run; leave it out"),
}


def take_arguments(caller: str, arguments: MutableMapping[str, Any], options: HubOptions) -> HubOptions:
    """Remove Transformers' arguments of `from_pretrained` from a dictionary.

    Args:
        caller: the name of the class, for the messages.
        arguments: changed in place; other arguments stay.
        options: the arguments of the download that the caller already has.

    Returns:
        The options, with the token of the older argument `use_auth_token`.

    Raises:
        TypeError: an argument has a value that is not supported; the message gives the remedy.
        ValueError: `use_auth_token` and `token` are both given.
    """
    for name in IGNORED:
        arguments.pop(name, None)
    for name, remedy in REFUSED.items():
        if value := arguments.pop(name, None):
            raise TypeError(f"{caller} does not support {name}={_short(value)}: {remedy}")
    for name, (values, remedy) in ONLY.items():
        value = arguments.pop(name, None)
        if value is not None and value not in values:
            raise TypeError(f"{caller} does not support {name}={_short(value)}: {remedy}")
    token = arguments.pop("use_auth_token", None)
    if token is None:
        return options
    if options.token is not None:
        raise ValueError("use_auth_token is the older name of token: leave it out")
    return replace(options, token=token)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
