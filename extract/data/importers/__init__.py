"""Importers: published data sets as downloaded, each in the layout that its repository publishes."""
