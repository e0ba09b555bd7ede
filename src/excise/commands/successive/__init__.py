"""Requests to forget, one after the other: what `excise ledger` does over the record that `excise.ledger` keeps."""
