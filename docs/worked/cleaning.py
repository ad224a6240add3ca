# %% [markdown]
# # Which labels are wrong
#
# 1000 handwritten digits to train on, half of them with a wrong label, and 500 clean ones. One
# weight for each training row, learned such that training with the weights does well on the clean
# rows.

# %%
import torch
from scipy.stats import mannwhitneyu
from sklearn.datasets import load_digits

import bilevel
from bilevel.solvers.implicit import AID
from bilevel.solvers.penalty import f2ba

torch.manual_seed(0)
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(images))  # the digits of one writer stand together
images, labels = torch.cat([images / 16, torch.ones(len(images), 1)], 1)[order], labels[order]
train, valid = slice(0, 1000), slice(1000, 1500)
given = labels[train].clone()
wrong = torch.rand(1000) < 0.5
given[wrong] = (given[wrong] + torch.randint(1, 10, (int(wrong.sum()),))) % 10


# %%
def upper(x, y):
    return torch.nn.functional.cross_entropy(images[valid] @ y, labels[valid])


def lower(x, y):
    losses = torch.nn.functional.cross_entropy(images[train] @ y, given, reduction="none")
    return (x.sigmoid() * losses).mean() + 2.5e-3 * y.square().sum()


x0, y0 = torch.zeros(1000, dtype=torch.float64), torch.zeros(65, 10, dtype=torch.float64)
solver = AID(lower_lr=0.5, upper_optimizer="sgd", upper_lr=300.0)
result = bilevel.minimize(upper, lower, x0, y0, solver=solver, steps=80)

# %% [markdown]
# The weights were learned from clean rows alone; nobody told which labels are wrong. How well do
# they rank them?

# %%
weights = result.x.sigmoid().numpy()
auroc = mannwhitneyu(weights[~wrong], weights[wrong]).statistic / (wrong.sum() * (~wrong).sum())
print(f"a clean row has the larger weight in {float(auroc):.3f} of all pairs")

# %% [markdown]
# Was it the method or luck? Hold x at the start, and compare what methods say with the exact
# hypergradient.

# %%
problem = bilevel.Functions(upper, lower, x0, y0)
found = bilevel.compare(problem, [solver, "darts", f2ba(lower_lr=0.5)], steps=50)
for row in found.rows:
    print(f"{row.method}: cosine to the exact hypergradient {row.cosine:.2f}")
