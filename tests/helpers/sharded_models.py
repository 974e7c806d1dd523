"""A language model that FSDP2 shards, for tests with several processes."""

from __future__ import annotations

from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_mue import MoELanguageModel


class ShardedLanguageModel(MoELanguageModel):
    """Shards itself where there is a mesh. Give it sizes that do not divide by the number of ranks."""

    def configure_model(self):
        if self.device_mesh is None or isinstance(self.transformer.embedding.weight, DTensor):
            return
        for block in self.transformer.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.transformer, mesh=self.device_mesh["data_parallel"])
