"""`hlora compare`: arms × tasks × seeds × strengths, each cell computed once."""
