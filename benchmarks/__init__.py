"""Measurements that README and docs quote; each prints its machine, versions and seed."""
