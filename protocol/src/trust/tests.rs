use super::*;

const DAY: u64 = 86_400;
const NOW: u64 = 1_800_000_000;

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

/// A root, its first admin's chain, and a submitter's chain signed by that admin.
fn mesh() -> (MeshId, Chain, Chain) {
    let (root, admin, node) = (key(1), key(2), key(3));
    let admin_chain = Chain::root(&root, node_of(&admin), NOW, 365 * DAY);
    let node_chain = admin_chain.issue(&admin, node_of(&node), Role::Submitter, NOW, 30 * DAY, 1);
    (mesh_of(&node_of(&root)), admin_chain, node_chain)
}

#[test]
fn a_chain_to_the_root_makes_a_member() {
    let (mesh, _, chain) = mesh();
    let member = chain.verify_shown_by(&node_of(&key(3)), &mesh, NOW).unwrap();
    assert_eq!(member.role, Role::Submitter);
    assert_eq!(member.not_after, NOW + 30 * DAY);
}

#[test]
fn expired_stolen_foreign_and_forged_chains_are_told_apart() {
    let (mesh, admin_chain, chain) = mesh();
    let node = node_of(&key(3));
    assert!(matches!(chain.verify(&mesh, NOW + 31 * DAY), Err(ChainError::Expired { .. })));
    assert!(matches!(chain.verify(&mesh, NOW - DAY), Err(ChainError::NotYet { .. })));
    assert!(matches!(chain.verify_shown_by(&node_of(&key(9)), &mesh, NOW), Err(ChainError::Stolen { .. })));
    assert!(matches!(chain.verify(&MeshId([0; 32]), NOW), Err(ChainError::Foreign { .. })));
    let mut forged = chain.clone();
    forged.0[0].certificate.role = Role::Admin;
    assert_eq!(forged.verify(&mesh, NOW), Err(ChainError::Forged { node }));
    assert_eq!(Chain(Vec::new()).verify(&mesh, NOW), Err(ChainError::Empty));
    let headless = Chain(chain.0[..1].to_vec());
    assert!(matches!(headless.verify(&mesh, NOW), Err(ChainError::Foreign { .. })));
    let long = Chain(vec![admin_chain.0[0].clone(); 5]);
    assert_eq!(long.verify(&mesh, NOW), Err(ChainError::TooLong { length: 5 }));
}

#[test]
fn only_an_admin_certifies() {
    let (mesh, _, chain) = mesh();
    let outsider = chain.issue(&key(3), node_of(&key(4)), Role::Worker, NOW, DAY, 1);
    assert_eq!(outsider.verify(&mesh, NOW), Err(ChainError::NotAdmin { issuer: node_of(&key(3)) }));
}

#[test]
fn a_certificate_never_outlives_its_issuer() {
    let (_, admin_chain, _) = mesh();
    let chain = admin_chain.issue(&key(2), node_of(&key(3)), Role::Worker, NOW, 999 * DAY, 1);
    assert_eq!(chain.leaf().unwrap().not_after, NOW + 365 * DAY);
}

#[test]
fn tickets_survive_text_and_say_what_is_wrong_with_it() {
    let ticket = Ticket {
        mesh: MeshId([1; 32]),
        inviter: NodeId([2; 32]),
        secret: [3; 16],
        expires: NOW,
        role: Role::Worker,
        addresses: vec!["/ip4/10.77.0.1/tcp/7788".to_owned()],
    };
    let text = ticket.to_string();
    assert_eq!(text.parse(), Ok(ticket.clone()));
    assert_eq!(format!("  {text}\n").parse(), Ok(ticket));
    assert_eq!("hello".parse::<Ticket>(), Err(TicketError::NotATicket));
    for cut in 0..text.len() {
        assert!(text[..cut].parse::<Ticket>().is_err(), "cut at {cut}");
    }
    assert_eq!(format!("{text}a").parse::<Ticket>(), Err(TicketError::Damaged));
    assert_eq!("moyai1A".parse::<Ticket>(), Err(TicketError::Character { position: 7 }));
}

#[test]
fn vouchers_count_nodes_and_end() {
    let mut vouchers = Vouchers::default();
    let (secret, nodes) = ([7; 16], [NodeId([1; 32]), NodeId([2; 32]), NodeId([3; 32])]);
    vouchers.add(&secret, Role::Worker, 2, NOW + 60, NOW).unwrap();
    assert_eq!(vouchers.redeem(&[8; 16], nodes[0], NOW), Err(VoucherError::Unknown));
    assert!(vouchers.redeem(&secret, nodes[0], NOW).is_ok());
    assert!(vouchers.redeem(&secret, nodes[0], NOW).is_ok(), "asking again is not a second use");
    assert!(vouchers.redeem(&secret, nodes[1], NOW + 1).is_ok());
    let used_up = VoucherError::UsedUp { uses: 2, last: NOW + 1 };
    assert_eq!(vouchers.redeem(&secret, nodes[2], NOW), Err(used_up));
    assert_eq!(vouchers.redeem(&secret, nodes[0], NOW + 61), Err(VoucherError::Expired { expires: NOW + 60 }));
}

#[test]
fn signatures_are_bound_to_their_purpose() {
    let signature = sign(&key(1), "one", b"text");
    assert!(verify(&node_of(&key(1)), "one", b"text", &signature));
    assert!(!verify(&node_of(&key(1)), "two", b"text", &signature));
    assert!(!verify(&node_of(&key(2)), "one", b"text", &signature));
}
