"""The baseline detectors that evaluation compares with the flow."""

import dataclasses

import numpy as np
import torch

from clipflow_ray.config import OPENAI_VIEW, TEST_TOWER, EncoderConfig, FlowConfig, Segment
from clipflow_ray.evaluate.baselines import BASELINES, fit_baselines
from clipflow_ray.model.checkpoint import Checkpoint
from clipflow_ray.model.flow import Flow
from clipflow_ray.statistics import auroc
from clipflow_ray.train.probes import fit_probes


def test_every_baseline_finds_the_wider_class_and_an_older_checkpoint_has_no_mlp() -> None:
    rng = np.random.default_rng(0)
    centre = np.ones(8)  # far from the origin, because only the direction of an embedding counts
    natural, proxy = ((centre + spread * rng.normal(size=(1500, 8))).astype(np.float32) for spread in (0.05, 0.15))
    config = FlowConfig(blocks=2, hidden=16)
    flow = Flow((8,), config)
    flow.fit_standardizer(torch.from_numpy(natural))
    checkpoint = Checkpoint(
        encoder=EncoderConfig(model=TEST_TOWER, pretrained="seed:0"),
        encoder_fingerprint="0" * 16,
        view=OPENAI_VIEW,
        segments=(Segment(feature="projected", size=224),),
        widths=(8,),
        flow_config=config,
        flow_state=flow.state_dict(),
        reference={"natural": torch.from_numpy(natural[:1000]), **fit_probes(flow, natural[:1000], proxy[:1000])},
    )
    scorers = fit_baselines(checkpoint)
    assert tuple(scorers) == BASELINES
    ranked = {name: auroc(scorer(natural[1000:]), scorer(proxy[1000:])) for name, scorer in scorers.items()}
    assert min(ranked.values()) > 0.9
    kept = {name: checkpoint.reference[name] for name in ("natural", "probe")}
    without = dataclasses.replace(checkpoint, reference=kept)
    assert tuple(fit_baselines(without)) == BASELINES[:-1]
