"""The engines and their router: starting real SGLang servers, and speaking to them."""
