"""INT8 weights and activations: conversion, loading and error measures."""
