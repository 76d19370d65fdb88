# SPDX-License-Identifier: Apache-2.0
"""RQ-Transformer and VQGAN's GPT against the numbers of the official code."""

import re

import pytest
import torch
from torch.nn import functional

from hf_var.conversion import export_rq_transformer, export_taming_gpt, load_rq_transformer, load_taming_gpt
from parity import load_lineage_case, official_gradients
from priors.rq import sample_codes, stacks_of


pytestmark = pytest.mark.parity
GPTS = ("class", "prefix", "window16")
RQ_TRANSFORMERS = ("class", "text", "tokens")


class Golden:
    """One of a case's models: loaded by `load`, its inputs with one axis of positions, and what it should give."""

    def __init__(self, system: str, name: str):
        self.case, self.name = load_lineage_case(system, name), name
        self.manifest, self.inputs, self.expected = self.case.manifest, self.case.inputs, self.case.expected
        self.codes = self.inputs[f"{name}/codes"]
        self.is_gpt, self.table = system == "gpt", None
        if self.is_gpt:
            arguments = self.manifest["gpt_args"][name]
            self.grid = self.manifest["grid"] if len(self.codes[0]) != 256 else [16, 16]
            self.overrides = {
                "patch_nums": [self.grid],
                "num_attention_heads": arguments["n_head"],
                "num_labels": self.manifest["n_classes"] if name == "class" else 0,
            }
            self.codes = self.codes.unsqueeze(-1)
        else:
            arguments = self.manifest["arch"][name]
            *self.grid, depth = arguments["block_size"]
            self.overrides = {
                "patch_nums": [self.grid] * depth,
                "num_attention_heads": arguments["body"]["block"]["n_head"],
                "hidden_act": {"v1": "gelu", "v2": "quick_gelu"}[arguments["body"]["block"]["gelu"]],
                "cumulative_depth_inputs": arguments["cumsum_depth_ctx"],
            }
            self.codes = self.codes.flatten(1, 2)
            self.table = load_lineage_case(system, "codebook").weights["weight"]
        labels = {"class_labels": self.inputs.get(f"{name}/labels")}
        prefix = {"condition_ids": self.inputs.get(f"{name}/condition_codes", self.inputs.get(f"{name}/condition"))}
        self.condition = {key: value for key, value in {**labels, **prefix}.items() if value is not None}
        if not self.condition:
            self.condition = {"class_labels": torch.full((len(self.codes),), -1)}

    def load(self, **overrides):
        load = load_taming_gpt if self.is_gpt else load_rq_transformer
        return load(self.case.weights, **{**self.overrides, **overrides})

    def stacks(self, model, codes):
        return stacks_of(model.config, codes, self.table)

    def assert_close(self, name, actual):
        expected = self.expected[f"{self.name}/{name}"]
        assert actual.numel() == expected.numel()
        self.case.assert_close(f"{self.name}/{name}", actual.reshape(expected.shape))

    def assert_scalar(self, name, actual):
        expected = self.case.scalars[f"{self.name}/{name}"]
        assert actual.item() == pytest.approx(expected, rel=1e-4, abs=2e-6), name

    def sampled(self):
        """Names of the sampled codes, with the settings that they state."""
        runs = [
            name
            for name in self.expected
            if re.fullmatch(rf"{self.name}/(greedy|sampled|completion)\w*[^/]*/\w+", name)
        ]
        for run in runs:
            _, settings, _ = run.split("/")

            def number(letter, default, kind=float, settings=settings):
                found = re.search(rf"_{letter}([\d.]+)", settings)
                return kind(found.group(1)) if found else default

            top_k, top_p = number("k", 0, int), number("p", 1.0)
            if settings == "greedy":
                top_k = 1
            if "per_depth" in settings:
                depth = self.codes.shape[-1]
                top_k, top_p = [12, 8, 6, 5][:depth], [0.95, 0.9, 0.85, 0.8][:depth]
            given = None
            if settings.startswith("completion"):
                num_given = len(self.codes[0]) // 2 if self.is_gpt else self.grid[1] + 2
                given = self.codes[:, :num_given]
            yield (
                run,
                {
                    "top_k": top_k,
                    "top_p": top_p,
                    "temperature": number("t", 1.0),
                    "seed": number("seed", 0, int),
                    "given": given,
                },
            )


@pytest.fixture(
    params=[("gpt", name) for name in GPTS] + [("rqtransformer", name) for name in RQ_TRANSFORMERS], ids="/".join
)
def golden(request):
    return Golden(*request.param)


def test_logits_and_losses(golden):
    model = golden.load()
    output = model(**golden.condition, **golden.stacks(model, golden.codes), labels=golden.codes)
    golden.assert_close("logits", output.logits)
    if f"{golden.name}/condition_logits" in golden.expected:
        golden.assert_close("condition_logits", output.condition_logits)
    losses = functional.cross_entropy(output.logits.permute(0, 3, 1, 2), golden.codes, reduction="none")
    if f"{golden.name}/loss" in golden.case.scalars:
        golden.assert_scalar("loss", losses.mean())
    for depth, loss in golden.case.scalars.get(f"{golden.name}/loss_per_depth", {}).items():
        assert losses[..., int(depth)].mean().item() == pytest.approx(loss, rel=1e-4, abs=2e-6)
    if output.condition_logits is None:
        assert output.loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    else:
        of_condition = functional.cross_entropy(output.condition_logits.mT, golden.condition["condition_ids"][:, 1:])
        golden.assert_scalar("condition_loss", of_condition)
        assert output.loss.item() == pytest.approx((0.9 * losses.mean() + 0.1 * of_condition).item(), rel=1e-6)


def test_gradients(golden):
    if f"{golden.name}/grad_norms" not in golden.case.scalars:
        pytest.skip("no gradients are stored")
    model = golden.load()
    model(**golden.condition, **golden.stacks(model, golden.codes), labels=golden.codes).loss.backward()
    export = export_taming_gpt if golden.is_gpt else export_rq_transformer
    gradients = official_gradients(model, export)
    assert gradients.keys() == golden.case.scalars[f"{golden.name}/grad_norms"].keys()
    for name, norm in golden.case.scalars[f"{golden.name}/grad_norms"].items():
        actual = gradients[name].double().norm().item()
        assert abs(actual - norm) <= 2e-4 * norm + 2e-6, f"{name}: {actual} for {norm}"
    for name in golden.expected:
        if name.startswith(f"{golden.name}/grad/"):
            golden.case.assert_close(name, gradients[name.removeprefix(f"{golden.name}/grad/")])


def test_sampled_codes(golden):
    model = golden.load()
    for name, settings in golden.sampled():
        expected = golden.expected[name]
        sampled = sample_codes(model, golden.condition, table=golden.table, **settings)
        assert torch.equal(sampled.reshape(expected.shape), expected), name


def test_soft_labels():
    golden = Golden("rqtransformer", "class")
    model = golden.load()
    codes, targets = (golden.expected[f"class/soft/{name}"] for name in ("codes_seed11", "targets"))
    stacks = golden.stacks(model, codes.flatten(1, 2))
    output = model(**golden.condition, **stacks, soft_labels=targets.flatten(1, 2))
    golden.assert_close("soft/logits", output.logits)
    golden.assert_scalar("soft/loss", output.loss)


def test_replaced_inputs():
    """Some inputs are other codes in training (`pkeep`), the labels are the right ones."""
    golden = Golden("gpt", "class")
    (section,) = {name.split("/")[1] for name in golden.expected if "pkeep" in name}
    inputs = golden.expected[f"class/{section}/inputs"].unsqueeze(-1)
    output = golden.load()(**golden.condition, codes=inputs, labels=golden.codes)
    golden.assert_close(f"{section}/logits", output.logits)
    golden.assert_scalar(f"{section}/loss", output.loss)


def test_condition_of_codes():
    golden = Golden("gpt", "prefix")
    inputs = {**golden.condition, "codes": golden.codes}
    golden.assert_close("logits_of_condition", golden.load(condition_loss_weight=0.5)(**inputs).condition_logits)
    bidirectional = golden.load(bidirectional_condition=True)
    golden.assert_close("unmasked_prefix_logits", bidirectional(**inputs).logits)
