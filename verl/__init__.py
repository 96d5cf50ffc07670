"""The trainer: GRPO for vision-language models, over Ray, FSDP2 and vLLM."""

from spatialthinker.versions import require

require("pydantic", "omegaconf", "torch", "ray")
