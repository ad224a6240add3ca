# %% [markdown]
# # How strongly to penalize every pixel
#
# Logistic regression on handwritten digits, a third of the pixels replaced by noise. One L2
# strength for each pixel is far too many for a grid; a hypergradient gives all 64 at once.

# %%
import torch
from sklearn.datasets import load_digits

import bilevel
from bilevel.solvers.implicit import AID

torch.manual_seed(0)
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(images))  # the digits of one writer stand together
images, labels = images[order] / 16, labels[order]
noisy = torch.rand(64) < 1 / 3
images[:, noisy] = torch.rand(len(images), int(noisy.sum()), dtype=torch.float64)
train, valid, test = slice(0, 200), slice(200, 800), slice(800, None)


def loss(y, rows):
    return torch.nn.functional.cross_entropy(images[rows] @ y, labels[rows])


# %% [markdown]
# Two losses. The upper variable is the logarithm of each strength, within bounds: where a pixel
# were not penalized at all the lower level would have no curvature to speak of, and a few rare
# pixels would be fitted to the validation rows. The lower level is strongly convex, so an
# implicit method fits; its step size is one over the largest curvature, which `hypergradient`
# measures.


# %%
def upper(x, y):
    return loss(y, valid)


def lower(x, y):
    return loss(y, train) + (x.exp()[:, None] * y.square()).mean()


x0 = torch.full((64,), -1.0, dtype=torch.float64)
y0 = torch.zeros(64, 10, dtype=torch.float64)
problem = bilevel.Functions(upper, lower, x0, y0)
assert bilevel.check(problem, solver="aid") == []
curvature = bilevel.hypergradient(problem, x0).evidence["largest"]
result = bilevel.minimize(
    upper,
    lower,
    x0,
    y0,
    solver=AID(inner_steps=50, lower_lr=1 / curvature, upper_lr=0.1),
    steps=100,
    project_upper=lambda x: x.clamp(-2.5, 6),
)
print(result.warnings)

# %% [markdown]
# Is it true? Solve the lower level again at the learned strengths, and compare with the best
# single strength.


# %%
def report(name, x):
    lower = bilevel.resolve(problem, x, y0)
    print(f"{name}: validation loss {lower.upper:.3f}, test loss {loss(lower.y, test):.3f}")


grid = [torch.full((64,), v / 2, dtype=torch.float64) for v in range(-12, 8)]
report("best single strength", min(grid, key=lambda x: bilevel.resolve(problem, x, y0).upper))
report("one for each pixel", result.x)
strengths = result.x.exp()
print(f"median strength of noisy pixels {strengths[noisy].median():.2f}, ", end="")
print(f"of the others {strengths[~noisy].median():.2f}")
