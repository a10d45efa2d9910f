"""Hashes of the muP tables of the shipped configs, as they were before there was an optimizer but AdamW."""

HASHES = {
    "dit_cifar_mup": "afc3f1383fbb5e2ecafb93c90a671a330a34dc0fd968225240d21e8f9bc66b15",
    "dit_debug_mup": "4c9d14dd0ec008f7e106c104a843e25d107d82fc22780930154676a0ff4e37af",
    "dit_proxy_mup": "54e909477067ef5242b1585d652d0d4f7b8b62e5537721659f0bea1832e89a90",
    "dit_proxy_sp": "871d7af8850b4dc435ab995da48e4a03adf33474b712fbe2c97cd95222b9224f",
    "dit_xl_2_mup": "200055c6bb769a5dfda85fc1ee98909cfbfe7a4a82664ce75dc44ac490c035e6",
    "dit_xl_2_sp": "11945cbd0e7612830b1512cd292bc455135c43aba14701bbce5d930b9481496d",
    "mmdit_0.18b_mup": "63d62b6ff93086c9a84b6fb181ebbdf54215acd6a4c25ebd5d1b9dae1b2f469c",
    "mmdit_0.7b_mup": "3dd47b56aa3562c804c559427c783ec33785a1b6ddbacd2c16d5e172e75529c5",
    "mmdit_18b_mup": "9db53dd81c691724d5f7b3eb6f95bc979b80954d83cff33e5028139acb42c89d",
    "mmdit_2b_mup": "7999d5948d7740c0571feab142b31fb95ff65979a3475013532fc4fb2445f066",
    "mmdit_debug_mup": "7f8bcdd80606f2849986717dc88fd3bbdb0878d38d95a205e0479bd402dcba2b",
    "mmdit_demo_mup": "eae1db616aaaa4e33ab5a73c66bc54b7aaa51f0c800d460b0e621779045df6d3",
    "pixart_0.04b_mup": "f70f9b487981859ca35e69cb382bca7c7a535190c1391556e1ce878eccf31373",
    "pixart_0.61b_mup": "175ac6237c6784eb8fc59d258ae1033b426f23062c48d88ab06874a0e074c1c2",
    "pixart_debug_mup": "f3342b34ea897a360c4d0ddf04bc2008095487bbeaf6bf652a28e602f4912cbd",
    "pixart_emoji_mup": "dff70d1d1d0419bb68f516b2632d5e4c4fea76f30f4a811e5cbf9fc0538e2771",
    "uvit_cifar_mup": "dcff18f3a7feb63287aa07b18ff36fc7ea48e7acb6cf203898397b343403641a",
    "uvit_debug_mup": "afcb5b7f534729be6f6028d10aedeccb315b4c7500dfeaab50c71816b34a7bd0",
    "uvit_h_2_mup": "c1e5cf6ac9bd974ee317a66d3c7ace8db44b6b8dcc73bead4da8b4ca71ad358a",
    "uvit_proxy_mup": "0d0e5e0249a290c2c2056a8957ab19f4d7ecbe7a04a1b80d4ecb886afd9801f0",
}
