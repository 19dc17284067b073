"""Train or caption with random weights, and print the peak of the process's memory above that before the weights."""

import json
import resource
import sys

import psutil
import torch

from dali_llava.modeling import LlavaAudioConfig, LlavaAudioForConditionalGeneration
from dali_llava.train.base_model import train_only
from dali_llava.train.planning.steps import Batch, step


def main(task: dict) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlavaAudioConfig.from_dict(task["config"])
    batch = Batch(config, task["inputs"], task["size"], task["text_tokens"])
    warm_up()
    before = psutil.Process().memory_info().rss
    model = LlavaAudioForConditionalGeneration(config)
    if task["new_tokens"]:
        caption(model.eval(), batch, task["new_tokens"])
    else:
        train(model, batch, task["trained"], task["checkpointing"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"before": before, "used": peak - before}))


def warm_up() -> None:
    """Load the libraries of the kernels."""
    weight = torch.randn(64, 64, requires_grad=True)
    torch.nn.functional.softmax(torch.randn(64, 64) @ weight, dim=-1).sum().backward()


def train(model, batch: Batch, trained: list[str], checkpointing: bool) -> None:
    train_only(model, *map(model.get_submodule, trained))
    if checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], fused=True)
    model.train()
    for _ in range(2):  # the second step has the optimizer's state
        step(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def caption(model, batch: Batch, new_tokens: int) -> None:
    inputs = batch.media() | batch.text() | {"use_cache": True}
    model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
