"""The traps that are known, the most specific first."""

from __future__ import annotations

from safeloop.nonfinite import trap_tests as is_case
from safeloop.nonfinite.traps import Trap


def _ops(names: str) -> frozenset[str]:
    return frozenset(names.split())


_SINGULAR = _ops(
    "sqrt rsqrt log log2 log10 log1p pow div true_divide reciprocal norm linalgvectornorm linalg_vector_norm std var "
    "acos asin atanh acosh erfinv logit cdist atan2 lgamma digamma exp expm1 sinh cosh tan mul square xlogy"
)
_SOFTMAX = _ops(
    "softmax log_softmax safe_softmax logsumexp scaled_dot_product_flash_attention_for_cpu "
    "scaled_dot_product_attention scaled_dot_product_attention_math scaled_dot_product_flash_attention "
    "scaled_dot_product_efficient_attention scaled_dot_product_cudnn_attention"
)
_NORMALISATIONS = _ops(
    "native_layer_norm native_batch_norm native_group_norm cudnn_batch_norm native_batch_norm_legit "
    "batch_norm_with_update fused_rms_norm nativelayernorm nativebatchnorm nativegroupnorm"
)
_EXPONENTIALS = _ops("exp expm1 exp2 sinh cosh")
_GROWING = _EXPONENTIALS | _ops(
    "square mul pow cumprod prod add sub sum mean mm addmm bmm baddbmm mv dot matmul linear convolution cumsum "
    "mse_loss var std norm linalg_vector_norm linalgvectornorm to_copy tocopy copy addcmul addcdiv rsub "
    "smooth_l1_loss huber_loss gelu silu cdist_forward euclidean_dist native_layer_norm accumulategrad"
)

TRAPS: tuple[Trap, ...] = (
    Trap(
        "custom backward",
        _ops(""),
        why="the backward of your own `torch.autograd.Function` gave it; torch checks nothing there",
        fix="guard the division, root or logarithm in that `backward`; compare it with numbers by "
        "`torch.autograd.gradcheck`, at the edges too",
        when=is_case.is_custom,
    ),
    Trap(
        "second derivative",
        _ops(""),
        why="the operation is part of a gradient that is differentiated again (`create_graph=True`), and that second "
        "derivative is infinite or undefined at its present values: a norm at 0, a root, a division",
        fix="add a small number inside the root where the gradient's norm is taken, "
        "`(g.square().sum(dim) + 1e-12).sqrt()`, and keep the function itself smooth there",
        when=is_case.is_second_order,
    ),
    Trap(
        "masked branch",
        _SINGULAR,
        why="the value is hidden by `torch.where`, a mask or a product with 0, its derivative is not: the gradient "
        "that arrives is 0, the derivative of `{op}` there is infinite or NaN, and 0 * inf is NaN",
        fix="guard the input, not the output: `torch.where(ok, x, 1.0)` before `{op}`, then the same mask after it",
        when=is_case.is_hidden,
    ),
    Trap(
        "fully masked softmax",
        _SOFTMAX,
        why="a row of the softmax is -inf throughout, so that it divides 0 by 0: everything in it is masked",
        fix="leave at least one entry of each row unmasked, drop such rows before, or mask with a large finite number "
        "(`torch.finfo(x.dtype).min`) and zero those rows afterwards",
        kind="nan",
    ),
    Trap(
        "no targets",
        _ops("nll_loss_forward nll_loss2d_forward nll_loss nll_loss2d nllloss nllloss2d cross_entropy_loss"),
        why="the loss is a mean over no target at all: every target is `ignore_index`, or the weights of the classes "
        "that occur sum to 0",
        fix='skip such batches, or take `reduction="sum"` and divide by `max(number of targets, 1)`',
        kind="nan",
    ),
    Trap(
        "ctc target too long",
        _ops("ctc_loss ctcloss"),
        why="a target is longer than its input allows, so that its probability is 0 and its loss infinite",
        fix="pass `zero_infinity=True`, or drop such samples",
    ),
    Trap(
        "mean of nothing",
        _ops("mean nanmean median std var div"),
        why="the selection is empty: its sum 0 is divided by its length 0",
        fix="multiply by the mask and divide by `mask.sum().clamp(min=1)`, or leave the term out on such batches",
        kind="nan",
        when=is_case.has_no_entries,
    ),
    Trap(
        "one sample",
        _ops("std var std_mean var_mean"),
        why="the unbiased variance divides by the number of values minus 1, and there is one value only",
        fix="pass `correction=0`, or leave the term out for a single value",
        phase="forward",
        kind="nan",
    ),
    Trap(
        "root at zero",
        _ops("sqrt rsqrt"),
        why="the derivative of `{op}` at 0 is infinite, and its argument is 0 at {bad}",
        fix="add a small number inside the root, `(x + 1e-12).sqrt()`, or for a distance use "
        "`torch.linalg.vector_norm(x, dim=...)`, whose gradient at 0 is 0",
        phase="backward",
    ),
    Trap(
        "root of a negative",
        _ops("sqrt rsqrt"),
        why="the argument of `{op}` is negative at {bad}; rounding alone can do it, where it is a difference",
        fix="`x.clamp(min=1e-12)` before `{op}`",
        phase="forward",
        kind="nan",
    ),
    Trap(
        "inverse root of zero",
        _ops("rsqrt"),
        why="the argument is 0 at {bad}, and 1 / sqrt(0) is infinite",
        fix="add a small number inside: `(x + 1e-12).rsqrt()`",
        phase="forward",
        kind="inf",
    ),
    Trap(
        "logarithm of a negative",
        _ops("log log2 log10 log1p xlogy special_xlog1py"),
        why="the argument of `{op}` is outside its domain at {bad}: negative (below -1 for log1p)",
        fix="`x.clamp(min=1e-8)` before the logarithm, or compute it from logits: `F.logsigmoid`, `F.log_softmax`",
        kind="nan",
        phase="forward",
    ),
    Trap(
        "logarithm of zero",
        _ops("log log2 log10 log1p xlogy special_xlog1py logit special_logit"),
        why="the argument of `{op}` is at the edge of its domain at {bad}: a probability that rounding made 0 or 1 is "
        "enough",
        fix="compute it from logits: `F.cross_entropy`, `F.binary_cross_entropy_with_logits`, `F.log_softmax`, "
        "`F.logsigmoid`; or `x.clamp(min=1e-8)` before it",
    ),
    Trap(
        "probability of 0 or 1",
        _ops("binary_cross_entropy binarycrossentropy kl_div"),
        why="a probability is 0 or 1, where the logarithm or its derivative is infinite",
        fix="give the logits to `F.binary_cross_entropy_with_logits`; `F.kl_div` wants log-probabilities",
    ),
    Trap(
        "power at zero",
        _ops("pow"),
        why="the exponent is below 1 and the base is 0 at {bad}: the derivative is infinite",
        fix="`(x + 1e-12) ** p`, or guard the base with `torch.where` before the power",
        phase="backward",
    ),
    Trap(
        "power of a negative",
        _ops("pow"),
        why="a negative base with a fractional exponent has no real power ({bad})",
        fix="`x.clamp(min=0)`, `x.abs()`, or `x.sign() * x.abs() ** p`, whichever is meant",
        phase="forward",
        kind="nan",
    ),
    Trap(
        "negative power of zero",
        _ops("pow"),
        why="a base of 0 with a negative exponent is a division by zero",
        fix="add a small number to the base",
        phase="forward",
        kind="inf",
        when=is_case.has_zero,
    ),
    Trap(
        "normalisation without eps",
        _NORMALISATIONS,
        why="the variance is 0, and `eps` is too small to keep the division finite",
        fix="give the normalisation layer its usual `eps` of 1e-5",
    ),
    Trap(
        "edge of an inverse function",
        _ops("acos asin atanh acosh erfinv arccos arcsin arctanh"),
        why="the argument of `{op}` is at or beyond the edge of its domain at {bad}, where its derivative is infinite",
        fix="`x.clamp(-1 + 1e-6, 1 - 1e-6)` before `{op}`; for the angle between vectors, `torch.atan2(cross, dot)`",
    ),
    Trap(
        "zero over zero",
        _ops("div true_divide weight_norm_interface weightnorminterface fmod remainder"),
        why="0 is divided by 0 at {bad}: a zero vector or a constant is normalised, or a mean is taken over nothing",
        fix="`F.normalize(x, dim=...)` for vectors; else `x / d.clamp(min=1e-8)`, or add a small number to a "
        "denominator that is not negative",
        kind="nan",
        when=lambda birth: not is_case.has_infinity(birth),
    ),
    Trap(
        "infinity over infinity",
        _ops("div true_divide"),
        why="infinity is divided by infinity; the infinities came before",
        fix="scale numerator and denominator down by the same factor: for exponentials, subtract their maximum first",
        kind="nan",
    ),
    Trap(
        "division by zero",
        _ops("div true_divide reciprocal addcdiv"),
        why="the denominator is 0 at {bad}",
        fix="`d.clamp(min=1e-8)` for a denominator that is not negative, or `torch.where(d == 0, 1.0, d)` before the "
        "division",
        when=is_case.has_zero_divisor,
    ),
    Trap(
        "zero times infinity",
        _ops("mul matmul mm bmm addmm dot mv"),
        why="0 is multiplied by infinity, which is NaN; a mask by multiplication cannot hide an infinite value",
        fix="select instead of multiplying: `torch.where(mask, x, 0.0)`, or `x.masked_fill(~mask, 0.0)`",
        kind="nan",
        when=is_case.has_infinity,
    ),
    Trap(
        "infinity minus infinity",
        _ops("add sub rsub sum mean logsumexp cumsum logcumsumexp"),
        why="infinity is subtracted from infinity, which is NaN",
        fix="keep infinities out of sums: mask with `torch.where` or a large finite number",
        kind="nan",
        when=is_case.has_infinity,
    ),
    Trap(
        "equal eigenvalues",
        _ops("linalgeigh linalgsvd linalgeig linalg_eigh linalg_svd"),
        why="the derivative of eigenvectors divides by differences of eigenvalues, and two are equal",
        fix="use a function of the eigenvalues alone (`eigvalsh`, `svdvals`), or perturb the matrix a little",
        phase="backward",
    ),
    Trap(
        "pole of the gamma function",
        _ops("lgamma digamma polygamma mvlgamma"),
        why="`{op}` has poles at 0 and at the negative whole numbers, and is infinite there",
        fix="`x.clamp(min=1e-6)` before `{op}`",
    ),
    Trap(
        "singular matrix",
        _ops("linalg_slogdet linalg_det det logdet linalg_inv_ex linalgslogdet linalgdet linalginvex"),
        why="the matrix is singular: its determinant is 0, its logarithm -inf",
        fix="add a small multiple of the identity: `m + 1e-6 * torch.eye(n)`",
    ),
    Trap(
        "half precision overflow",
        _ops(""),
        why="the result passes 65504, the largest float16 number, at {bad}",
        fix="use `run.precision: bf16`, scale the values down, or compute this line in float32: "
        "`with torch.autocast(x.device.type, enabled=False): f(x.float())`",
        kind="inf",
        when=is_case.is_half,
    ),
    Trap(
        "overflow of an exponential",
        _EXPONENTIALS,
        why="the exponential passes the largest {dtype} number at {bad}; in float32 exp(88.8) does",
        fix="work with logarithms (`logsumexp`, `log_softmax`, `softplus`), subtract the maximum, or bound the "
        "argument: `x.clamp(max=80)`",
        kind="inf",
    ),
    Trap(
        "overflow",
        _GROWING,
        why="the result passes the largest {dtype} number at {bad}: values grow from layer to layer, or from step to "
        "step",
        fix="look at the ranges above: normalise the values before, bound them, lower the learning rate, or clip "
        "(`max_norm`)",
        kind="inf",
    ),
)
