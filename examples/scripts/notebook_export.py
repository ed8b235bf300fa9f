#!/usr/bin/env python
# coding: utf-8
# ruff: noqa: B018, UP009

# # Spirals
# Exported from a notebook. Ill: weights of standard deviation 8.

# In[1]:

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(42)

# In[2]:

t = torch.rand(1000) * 3
sign = torch.randint(0, 2, (1000,)) * 2 - 1
X = torch.stack([sign * t * torch.cos(2 * t), sign * t * torch.sin(2 * t)], 1)
X = torch.cat([X, X**2, X.prod(1, keepdim=True)], 1)
Y = (sign > 0).long()
X.shape, Y.shape

# In[3]:


class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.a = nn.Linear(5, width)
        self.b = nn.Linear(width, width)
        self.c = nn.Linear(width, 2)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


net = Net()
if "--ill" in sys.argv:
    nn.init.normal_(net.b.weight, std=8.0)

# In[4]:

# a first look at the outputs
net(X[:4])

# In[5]:

opt = torch.optim.Adam(net.parameters(), 3e-3)
losses = []
for _ in range(10):
    for batch in torch.randperm(1000).split(50):
        opt.zero_grad()
        loss = F.cross_entropy(net(X[batch]), Y[batch])
        loss.backward()
        opt.step()
    losses.append(loss.item())

# In[6]:

print(repr(losses[-1]))
