"""The methods, by the name a recipe gives in ``method``."""

from typing import Any

from engine.schema import with_sections
from pretrain.cim import CIM
from pretrain.config import PretrainConfig
from pretrain.convmae import ConvMAE
from pretrain.dvae import DVAETraining
from pretrain.fcmae import FCMAE
from pretrain.spark import SparK

METHODS: dict[str, Any] = {"cim": CIM, "convmae": ConvMAE, "dvae": DVAETraining, "fcmae": FCMAE, "spark": SparK}


SCHEMAS = {name: with_sections(PretrainConfig, method.sections) for name, method in METHODS.items()}
