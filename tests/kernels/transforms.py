"""What torch.func's transforms have to equal: a plain loop over the members of a batch."""

import torch
from torch.func import grad, vmap

from tests.kernels.cases import same_bits


def looped(f, in_dims, *arguments):
    """`f` of one member after the other, as vmap defines it."""
    size = next(x.shape[d] for x, d in zip(arguments, in_dims, strict=True) if d is not None)
    each = [
        f(*(x if d is None else x.select(d, i) for x, d in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    ]
    return tuple(torch.stack(x) for x in zip(*each, strict=True))


def check_loop(f, in_dims, *arguments):
    """vmap(f), of tensors or None, has the bits of the loop; f returns a tuple."""
    found = vmap(f, in_dims=in_dims)(*arguments)
    for a, b in zip(found, looped(f, in_dims, *arguments), strict=True):
        assert same_bits(a, b)


def eager_gradients(f, argnums):
    """torch.autograd's gradients of f's result, a tensor."""

    def gradients(*arguments):
        leaves = [
            x.detach().clone().requires_grad_() if i in argnums else x
            for i, x in enumerate(arguments)
        ]
        return torch.autograd.grad(f(*leaves), [leaves[i] for i in argnums])

    return gradients


def check_gradients_of_members(f, argnums, in_dims, *arguments):
    """vmap(grad(f)) has the bits of backward() for each member."""
    found = vmap(grad(f, argnums=argnums), in_dims=in_dims)(*arguments)
    expected = looped(eager_gradients(f, argnums), in_dims, *arguments)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


def check_gradient_of_a_batch(f, in_dims, *arguments, rtol):
    """grad(vmap(f).sum()) is the sum of the members' gradients where they share an input."""
    floats = tuple(i for i, x in enumerate(arguments) if x.is_floating_point())
    found = grad(lambda *x: vmap(f, in_dims=in_dims)(*x).sum(), argnums=floats)(*arguments)
    each = looped(eager_gradients(f, floats), in_dims, *arguments)
    for i, a, b in zip(floats, found, each, strict=True):
        expected = b.double().sum(0) if in_dims[i] is None else b.double().movedim(0, in_dims[i])
        torch.testing.assert_close(a.double(), expected, rtol=rtol, atol=rtol)
