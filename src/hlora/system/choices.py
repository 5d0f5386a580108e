"""The values of options that the configuration and the library share."""

from __future__ import annotations

from typing import Literal

LayerWeights = Literal["softmax", "norm_share", "uniform", "sum", "root"]
PhiScale = Literal["relative", "paper"]
Group = Literal["matrix", "block"]
Anchor = Literal["general", "base"]
EncodingName = Literal["float32", "factored"]
Method = Literal["path_integral", "squared_gradients"]
Unprotected = Literal["refuse", "warn"]
