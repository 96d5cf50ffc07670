"""Systems: Ray worker groups, FSDP2, checkpoints, optimizers, CPU offloading."""
