"""From a sampler and a budget to a cache schedule. Imports runtime."""
