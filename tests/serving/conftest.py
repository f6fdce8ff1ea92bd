"""Checkpoints with random heads, of each source, for the small models."""

import dataclasses

import pytest
import torch

M, D_Z = 12, 24


@pytest.fixture(scope="session")
def checkpoint_of(llms, texts, llm_folders, encoder_folder, tmp_path_factory):
    """checkpoint_of(source, seed): a folder. Checkpoints of other seeds have other encoders."""
    from latentwire.models.checkpoint import save_checkpoint
    from latentwire.models.closed_form import closed_form
    from latentwire.models.encoders.selecting import SelectingEncoder

    made = {}

    def make(source="prompt", seed=0):
        if (source, seed) not in made:
            before, adapters, _ = closed_form(llms, texts, D_Z)
            torch.manual_seed(seed)
            encoder = SelectingEncoder.begin(before, SelectingEncoder.Settings(encoder_id=encoder_folder), M)
            torch.nn.init.normal_(encoder.score.weight)
            torch.nn.init.normal_(encoder.residual.weight, std=0.01)
            ids = {name: llm_folders[f"{name.upper()}_ID"] for name in llms}
            config = {"schema": 1, "stage": "joint", "source": source, "latent_len": M, "d_z": D_Z, "llms": ids}
            folder = tmp_path_factory.mktemp("serving") / f"{source}{seed}"
            save_checkpoint(folder, encoder, adapters, config)
            made[source, seed] = folder
        return made[source, seed]

    return make


@pytest.fixture(scope="session")
def questions():
    """On contexts that the small encoder reads at once."""
    from latentwire.data.squad import load

    return [
        dataclasses.replace(q, context=f"{q.context[:120].rsplit(' ', 1)[0]}.") for q in load("sample", "dev").questions
    ]
