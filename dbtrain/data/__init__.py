"""Sources -> Arrow shards -> memory-mapped batches in a stateless order, distorted per sample."""
