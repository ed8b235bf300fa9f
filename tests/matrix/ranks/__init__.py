"""What the distributed cells run, one script a launch of ``torch.distributed.run``."""
