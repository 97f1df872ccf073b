"""INT8 and 4-bit weights, INT8 activations: conversion, loading and error measures."""
