# SPDX-License-Identifier: Apache-2.0
"""
train_var.py with a model that is split over processes by Accelerate's FSDP2. Accelerate leaves it out on CPUs, though
torch could: it is told here that there is no difference.
"""

import os
import sys


os.environ["FSDP_VERSION"] = "2"

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from hf_var.training import accelerator
from hf_var.training.sharding import is_sharded


class ShardingAccelerator(Accelerator):
    def __init__(self, **options):
        super().__init__(cpu=True, **options)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["VARBlock"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    accelerator.Accelerator = ShardingAccelerator
    import train_var

    class CheckedRun(train_var.TrainingRun):
        def started(self, parts, arguments=None):
            assert is_sharded(parts["model"])
            return super().started(parts, arguments)

    train_var.TrainingRun = CheckedRun
    train_var.main(sys.argv[2:])
