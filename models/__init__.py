"""Networks only: encoders, tokenizer, decoders and the pure functions around them."""

import models.convvit
import models.grn  # noqa: F401  (both register their encoders in timm)
