"""The page of `fastuper serve`: photos in the browser, and the same results as JSON.

`server` runs it, `app` has the addresses, `page` the components, `service` the work, and `viewer/` what the browser
draws.
"""
