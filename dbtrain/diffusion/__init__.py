"""The mathematics: noise levels, their partition, preconditioning, the codebook, the chain. No I/O."""
