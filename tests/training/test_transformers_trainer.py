# SPDX-License-Identifier: Apache-2.0
"""Trainings by transformers' own trainer, on a data set of codes."""

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_var import VARConfig, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.training.prior_inputs import prior_inputs


SIZES = {"codebook_size": 16, "latent_channels": 4, "patch_nums": (1, 2)}


@pytest.fixture(scope="module")
def vqvae():
    return VQVAEModel(VQVAEConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, **SIZES)).eval()


@pytest.fixture
def transformer():
    config = VARConfig(
        num_labels=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, drop_path_rate=0.0, **SIZES
    )
    torch.manual_seed(0)
    return VARTransformer(config)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (8, 5), generator=generator).tolist()
    return datasets.Dataset.from_dict({"codes": codes, "label": [0, 1, 2, 0, 1, 2, 0, 1]})


def trainer_for(transformer, vqvae, rows, folder, is_conditional=True, **arguments):
    def collate(batch):
        inputs = {"codes": torch.tensor([row["codes"] for row in batch])}
        if is_conditional:
            inputs["class_labels"] = torch.tensor([row["label"] for row in batch])
        return prior_inputs(vqvae, inputs)

    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        use_cpu=True,
        **arguments,
    )
    return Trainer(transformer, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)


@pytest.mark.parametrize("is_conditional", [True, False])
def test_two_steps_and_a_validation_loss(transformer, vqvae, rows, tmp_path, is_conditional):
    trainer = trainer_for(transformer, vqvae, rows, tmp_path, is_conditional)
    before = transformer.head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(transformer.head.weight, before)
    labels = torch.tensor(rows["label"]) if is_conditional else None
    inputs = {"codes": torch.tensor(rows["codes"])}
    with torch.no_grad():
        expected = transformer.eval()(class_labels=labels, **prior_inputs(vqvae, inputs)).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-5)
    # The targets are the codes alone, and the predictions of every token's logits.
    predictions = trainer.predict(rows)
    assert predictions.label_ids.tolist() == rows["codes"]
    assert predictions.predictions.shape == (8, 5, 16)


def test_accumulated_batches_are_one_large_batch(transformer, vqvae, rows, tmp_path):
    state = {name: value.clone() for name, value in transformer.state_dict().items()}
    transformer.config.class_dropout_prob = 0.0
    gradients = []
    for batch_size, steps in ((8, 1), (2, 4)):
        transformer.load_state_dict(state)
        folder = tmp_path / str(batch_size)
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
        trainer = trainer_for(transformer, vqvae, rows, folder, max_grad_norm=0.0, **sizes)
        trainer.create_optimizer()
        gradients.append([])
        trainer.optimizer.register_step_pre_hook(lambda *_: gradients[-1].append(transformer.head.bias.grad.clone()))
        trainer.train()
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=1e-4, atol=1e-6)
