"""The rows of the paper's Table 1 that RecBole 1.2.1 has, and the settings that are tried for each.

A setting lists the keys of RecBole that differ from RecBole's own defaults (`recbole/properties/model/NAME.yaml` and
`overall.yaml`); the first setting of every model changes nothing. RecBole's batch of 2,048 gives few steps per epoch on
a small domain, so a smaller one is the next. They are tried in this order until the recipe's `minutes` are over; each
gets at most half of the time that is left, the last one all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SMALL_BATCH = {"train_batch_size": 256}
DROPOUT = ("hidden_dropout_prob", "attn_dropout_prob")


@dataclass(frozen=True)
class RecBoleModel:
    """A model of RecBole: its class there, and further settings that are tried after its defaults."""

    recbole_class: str
    tries: tuple[Mapping[str, Any], ...]

    @property
    def settings(self) -> tuple[Mapping[str, Any], ...]:
        """All settings, in the order in which they are tried."""
        return ({}, SMALL_BATCH, *({**SMALL_BATCH, **changed} for changed in self.tries))


# Name of the row and of its folders -> the model, in the order of tables.
RECBOLE_MODELS: Mapping[str, RecBoleModel] = {
    "fossil": RecBoleModel("FOSSIL", ({"embedding_size": 128}, {"reg_weight": 1e-4})),
    "transrec": RecBoleModel("TransRec", ({"embedding_size": 128}, {"learning_rate": 1e-2})),
    "gru4rec": RecBoleModel("GRU4Rec", ({"dropout_prob": 0.5}, {"embedding_size": 128})),
    "nextitnet": RecBoleModel("NextItNet", ({"block_num": 2}, {"embedding_size": 128})),
    "sine": RecBoleModel("SINE", ({"interest_size": 1}, {"embedding_size": 128})),
    "lightsans": RecBoleModel("LightSANs", (dict.fromkeys(DROPOUT, 0.2), {"k_interests": 10})),
    "bert4rec": RecBoleModel("BERT4Rec", (dict.fromkeys(DROPOUT, 0.5), {"mask_ratio": 0.4})),
    "s3rec": RecBoleModel("S3Rec", (dict.fromkeys(DROPOUT, 0.2), {"mask_ratio": 0.4})),
}
# The paper's other rows -> why there is none here.
NOT_IN_RECBOLE: Mapping[str, str] = {"dfm": "DFM is a row of the paper's Table 1, and RecBole 1.2.1 does not have it"}
